# torchrun --nnodes=8 --nproc_per_node=8 train.py config/train_neox_1.5b_adamw.py
# Paper, Fig. 4: validation loss 2.250 on the Pile after 100k steps, with GPT-NeoX's architecture.
# Initialisation is GPT-2's, which the paper does not say for these models.
n_layer = 48
n_head = 24
n_embd = 1536
block_size = 2048
bias = True
activation = "gelu"
rotary_fraction = 0.25
parallel_residual = True
tied_head = False
dataset = "pile"
batch_size = 8
total_batch_size = 512  # appendix C.2, which lists it by model; section 3.1 says 2048 for both
optimizer = "adamw"
learning_rate = 1.5e-4
parallel = "fsdp"
