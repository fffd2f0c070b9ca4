# torchrun --nproc_per_node=8 train.py config/train_gpt2_540m_adamw.py
# Expected: the paper prints no validation loss for this size (sizes and rates: Table 2).
n_layer = 30
n_head = 18
n_embd = 1152
scale_attn_by_inverse_layer_idx = True  # without it AdamW's largest stable rate here is lower
batch_size = 6
optimizer = "adamw"
learning_rate = 3e-4
