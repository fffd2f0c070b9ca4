# torchrun --nproc_per_node=8 train.py config/train_gpt2_medium_lion.py
# Expected: validation loss 2.678 on OpenWebText after 100k steps (paper, Fig. 4).
out_dir = "out/gpt2-medium-lion"

n_layer = 24
n_head = 16
n_embd = 1024
vocab_size = 50304
block_size = 1024
scale_attn_by_inverse_layer_idx = True

dataset = "openwebtext"
batch_size = 10
total_batch_size = 480

optimizer = "lion"
learning_rate = 6e-5
beta1 = 0.95
beta2 = 0.98
weight_decay = 0.2
grad_clip = 1.0

max_iters = 100_000
warmup_iters = 2000
min_lr_ratio = 0.05

eval_interval = 1000
log_interval = 10
checkpoint_interval = 1000
wandb_run_name = "gpt2-medium-lion"
