# torchrun --nproc_per_node=8 train.py config/train_gpt2_small_sophiag.py
# Expected: validation loss 2.875 on OpenWebText after 100k steps (paper, Fig. 4).
batch_size = 15
