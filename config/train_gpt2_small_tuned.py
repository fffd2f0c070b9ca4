# torchrun --nproc_per_node=8 train.py config/train_gpt2_small_tuned.py
# Sophia-G with a controlled gamma in place of the paper's. Extrapolated from models of 0.2 to 6M
# parameters (results/study.md, results/controlled_gamma.md); nothing was measured at this size. The
# smallest of them did best at 1.25 to 1.7 times AdamW's rate; at 2.7M 1.5 times ruined the run and
# 0.75 times won, so the rate here is AdamW's. Changed from train_gpt2_small_sophiag.py:
# learning_rate, beta1, gamma.
out_dir = "out/gpt2-small-tuned"

n_layer = 12
n_head = 12
n_embd = 768
vocab_size = 50304
block_size = 1024

dataset = "openwebtext"
batch_size = 15
total_batch_size = 480

optimizer = "sophiag"
learning_rate = 6e-4  # AdamW's in the paper
beta1 = 0.9
beta2 = 0.99
gamma_target = 0.9  # a gamma of its own for each tensor (beyond the paper)
gamma_rows = "embedding"  # and for each row of the embeddings
eps = 1e-12
weight_decay = 0.2
hessian_interval = 10
hessian_batch_size = 240
grad_clip = 1.0

max_iters = 100_000
warmup_iters = 2000
min_lr_ratio = 0.05

eval_interval = 1000
log_interval = 10
checkpoint_interval = 1000
wandb_run_name = "gpt2-small-tuned"
