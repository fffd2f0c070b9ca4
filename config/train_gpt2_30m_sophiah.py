# torchrun --nproc_per_node=8 train.py config/train_gpt2_30m_sophiah.py
# Expected: the paper prints no validation loss for this size (sizes and rates: Table 2).
out_dir = "out/gpt2-30m-sophiah"

n_layer = 6
n_head = 6
n_embd = 384
vocab_size = 50304
block_size = 1024

dataset = "openwebtext"
batch_size = 30
total_batch_size = 480

optimizer = "sophiah"
learning_rate = 1e-3
beta1 = 0.96
beta2 = 0.99
gamma = 0.01
eps = 1e-12
weight_decay = 0.2
hessian_interval = 10
hessian_batch_size = 32
grad_clip = 1.0

max_iters = 100_000
warmup_iters = 2000
min_lr_ratio = 0.05

eval_interval = 1000
log_interval = 10
checkpoint_interval = 1000
wandb_run_name = "gpt2-30m-sophiah"
