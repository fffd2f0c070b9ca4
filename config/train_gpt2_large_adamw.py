# torchrun --nproc_per_node=8 train.py config/train_gpt2_large_adamw.py
# Expected: validation loss 2.613 on OpenWebText after 100k steps (paper, Fig. 4);
# 3.25 s per step on A100s (paper, Table 1).
n_layer = 36
n_head = 20
n_embd = 1280
scale_attn_by_inverse_layer_idx = True  # without it AdamW's largest stable rate here is lower
batch_size = 5
optimizer = "adamw"
learning_rate = 2e-4
