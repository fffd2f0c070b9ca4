# torchrun --nproc_per_node=8 train.py config/train_gpt2_medium_adamw.py
# Expected: validation loss 2.691 on OpenWebText after 100k steps (paper, Fig. 4);
# 1.77 s per step on A100s (paper, Table 1).
n_layer = 24
n_head = 16
n_embd = 1024
scale_attn_by_inverse_layer_idx = True  # without it AdamW's largest stable rate here is lower
batch_size = 10
optimizer = "adamw"
learning_rate = 3e-4
