# torchrun --nproc_per_node=8 train.py config/train_gpt2_small_lion.py
# Expected: validation loss 2.924 on OpenWebText after 100k steps (paper, Fig. 4).
optimizer = "lion"
batch_size = 15
