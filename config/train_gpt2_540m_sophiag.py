# torchrun --nproc_per_node=8 train.py config/train_gpt2_540m_sophiag.py
# Expected: the paper prints no validation loss for this size (sizes and rates: Table 2).
n_layer = 30
n_head = 18
n_embd = 1152
batch_size = 6
learning_rate = 4e-4
