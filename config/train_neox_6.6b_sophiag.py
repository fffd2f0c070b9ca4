# torchrun --nnodes=8 --nproc_per_node=8 train.py config/train_neox_6.6b_sophiag.py
# Paper, Fig. 4: validation loss 1.969 on the Pile after 100k steps, with GPT-NeoX's architecture.
# Here the shape is the paper's and the architecture GPT-2's, so that figure is no prediction.
out_dir = "out/neox-6.6b-sophiag"

n_layer = 32
n_head = 32
n_embd = 4096
vocab_size = 50304  # GPT-NeoX's tokenizer has 50277 ids
block_size = 2048

dataset = "pile"
batch_size = 4
total_batch_size = 1024  # appendix C.2, which lists it by model; section 3.1 says 2048 for both

optimizer = "sophiag"
learning_rate = 6e-5
beta1 = 0.96
beta2 = 0.99
gamma = 0.05
eps = 1e-12
weight_decay = 0.2
hessian_interval = 10
hessian_batch_size = 256  # the paper: 240, which 64 and 256 ranks do not divide
grad_clip = 1.0

max_iters = 100_000
warmup_iters = 2000
min_lr_ratio = 0.05

parallel = "fsdp"
activation_checkpointing = True

eval_interval = 1000
log_interval = 10
checkpoint_interval = 1000
wandb_run_name = "neox-6.6b-sophiag"
