# torchrun --nproc_per_node=8 train.py config/train_gpt2_small_sophiah.py
# Expected: validation loss 2.901 on OpenWebText after 100k steps (paper, Fig. 4).
optimizer = "sophiah"
batch_size = 15
