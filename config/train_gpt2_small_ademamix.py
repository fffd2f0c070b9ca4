# torchrun --nproc_per_node=8 train.py config/train_gpt2_small_ademamix.py
# AdEMAMix (arXiv:2409.03137), at AdamW's rate in the paper. Nothing was measured at this size;
# results/study.md says what it reached at smaller ones.
batch_size = 15
optimizer = "ademamix"
