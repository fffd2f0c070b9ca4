# torchrun --nnodes=8 --nproc_per_node=8 train.py config/train_neox_6.6b_sophiag.py
# Paper, Fig. 4: validation loss 1.969 on the Pile after 100k steps, with GPT-NeoX's architecture.
# Initialisation is GPT-2's, which the paper does not say for these models.
n_layer = 32
n_head = 32
n_embd = 4096
block_size = 2048
bias = True
activation = "gelu"
rotary_fraction = 0.25
parallel_residual = True
tied_head = False
dataset = "pile"
batch_size = 4
total_batch_size = 1024  # appendix C.2, which lists it by model; section 3.1 says 2048 for both
learning_rate = 6e-5
parallel = "fsdp"
activation_checkpointing = True
