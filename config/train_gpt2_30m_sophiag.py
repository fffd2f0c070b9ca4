# torchrun --nproc_per_node=8 train.py config/train_gpt2_30m_sophiag.py
# Expected: the paper prints no validation loss for this size (sizes and rates: Table 2).
n_layer = 6
n_head = 6
n_embd = 384
batch_size = 30
learning_rate = 1e-3
