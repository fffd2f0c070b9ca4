# torchrun --nproc_per_node=8 train.py config/train_gpt2_large_sophiah.py
# Expected: validation loss 2.554 on OpenWebText after 100k steps (paper, Fig. 4);
# 3.40 s per step on A100s (paper, Table 1).
n_layer = 36
n_head = 20
n_embd = 1280
batch_size = 5
optimizer = "sophiah"
learning_rate = 3e-4
