# torchrun --nproc_per_node=8 train.py config/ablation_clip.py
# Fig. 7c: the clip without curvature (Clip), which is sign momentum. 30M model; compare with
# train_gpt2_30m_sophiag.py.
out_dir = "out/ablation-clip"

n_layer = 6
n_head = 6
n_embd = 384
vocab_size = 50304
block_size = 1024

dataset = "openwebtext"
batch_size = 30
total_batch_size = 480

optimizer = "clip"
learning_rate = 4e-4
beta1 = 0.96
eps = 1e-12
weight_decay = 0.2
grad_clip = 1.0

max_iters = 100_000
warmup_iters = 2000
min_lr_ratio = 0.05

eval_interval = 1000
log_interval = 10
checkpoint_interval = 1000
wandb_run_name = "ablation-clip"
