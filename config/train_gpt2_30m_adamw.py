# torchrun --nproc_per_node=8 train.py config/train_gpt2_30m_adamw.py
# Expected: the paper prints no validation loss for this size (sizes and rates: Table 2).
n_layer = 6
n_head = 6
n_embd = 384
batch_size = 30
optimizer = "adamw"
learning_rate = 1.2e-3
