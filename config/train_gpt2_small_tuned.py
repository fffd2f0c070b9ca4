# torchrun --nproc_per_node=8 train.py config/train_gpt2_small_tuned.py
# Sophia-G with a controlled gamma in place of the paper's. Extrapolated from models of 0.2 to 6M
# parameters (results/study.md, results/controlled_gamma.md); nothing was measured at this size. The
# smallest of them did best at 1.25 to 1.7 times AdamW's rate; at 2.7M 1.5 times ruined the run and
# 0.75 times won, so the rate here is AdamW's. Changed from train_gpt2_small_sophiag.py:
# learning_rate, beta1, gamma.
beta1 = 0.9
gamma_target = 0.9  # a gamma of its own for each tensor (beyond the paper)
gamma_rows = "embedding"  # and for each row of the embeddings
batch_size = 15
