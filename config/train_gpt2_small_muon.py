# torchrun --nproc_per_node=8 train.py config/train_gpt2_small_muon.py
# Not in the paper: Muon on the hidden matrices at AdamW's rate (its updates are scaled to the
# same size), AdamW on the rest. No expected loss is known for these settings.
out_dir = "out/gpt2-small-muon"

n_layer = 12
n_head = 12
n_embd = 768
vocab_size = 50304
block_size = 1024

dataset = "openwebtext"
batch_size = 15
total_batch_size = 480

optimizer = "muon"
learning_rate = 6e-4
muon_momentum = 0.95
beta1 = 0.9
beta2 = 0.95
eps = 1e-8
weight_decay = 0.1
grad_clip = 1.0

max_iters = 100_000
warmup_iters = 2000
min_lr_ratio = 0.05

eval_interval = 1000
log_interval = 10
checkpoint_interval = 1000
wandb_run_name = "gpt2-small-muon"
