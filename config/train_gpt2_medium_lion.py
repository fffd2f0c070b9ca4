# torchrun --nproc_per_node=8 train.py config/train_gpt2_medium_lion.py
# Expected: validation loss 2.678 on OpenWebText after 100k steps (paper, Fig. 4).
n_layer = 24
n_head = 16
n_embd = 1024
scale_attn_by_inverse_layer_idx = True
batch_size = 10
optimizer = "lion"
learning_rate = 6e-5
