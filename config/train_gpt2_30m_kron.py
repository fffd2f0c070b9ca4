# torchrun --nproc_per_node=8 train.py config/train_gpt2_30m_kron.py
# PSGD-Kron (arXiv:2402.04553) on the hidden matrices, AdamW on the rest, at AdamW's rate in the
# paper. Nothing was measured at this size; results/study.md says what it reached at smaller
# ones.
n_layer = 6
n_head = 6
n_embd = 384
batch_size = 30
optimizer = "kron"
learning_rate = 1.2e-3
