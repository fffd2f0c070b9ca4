# torchrun --nproc_per_node=8 train.py config/train_gpt2_medium_sophiag.py
# Expected: validation loss 2.627 on OpenWebText after 100k steps (paper, Fig. 4);
# 1.86 s per step on A100s (paper, Table 1).
n_layer = 24
n_head = 16
n_embd = 1024
batch_size = 10
learning_rate = 4e-4
