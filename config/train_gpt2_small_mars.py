# torchrun --nproc_per_node=8 train.py config/train_gpt2_small_mars.py
# MARS-AdamW (arXiv:2411.10438), at AdamW's rate in the paper. Nothing was measured at this size;
# results/optimizers_200_steps.md says what it reached at smaller ones.
batch_size = 15
optimizer = "mars"
