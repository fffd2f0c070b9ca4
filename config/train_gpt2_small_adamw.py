# torchrun --nproc_per_node=8 train.py config/train_gpt2_small_adamw.py
# Expected: validation loss 2.921 on OpenWebText after 100k steps (paper, Fig. 4).
optimizer = "adamw"
batch_size = 15
