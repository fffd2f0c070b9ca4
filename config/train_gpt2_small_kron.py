# torchrun --nproc_per_node=8 train.py config/train_gpt2_small_kron.py
# PSGD-Kron (arXiv:2402.04553) on the hidden matrices, AdamW on the rest, at AdamW's rate in the
# paper. Nothing was measured at this size; results/study.md says what it reached at smaller
# ones.
batch_size = 15
optimizer = "kron"
