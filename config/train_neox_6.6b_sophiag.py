# torchrun --nnodes=8 --nproc_per_node=8 train.py config/train_neox_6.6b_sophiag.py
# Paper, Fig. 4: validation loss 1.969 on the Pile after 100k steps, with GPT-NeoX's architecture.
# Here the shape is the paper's and the architecture GPT-2's, so that figure is no prediction.
n_layer = 32
n_head = 32
n_embd = 4096
block_size = 2048
dataset = "pile"
batch_size = 4
total_batch_size = 1024  # appendix C.2, which lists it by model; section 3.1 says 2048 for both
learning_rate = 6e-5
hessian_batch_size = 256  # the paper: 240, which 64 and 256 ranks do not divide
parallel = "fsdp"
activation_checkpointing = True
