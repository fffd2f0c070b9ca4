# torchrun --nproc_per_node=8 train.py config/ablation_ah_clip.py
# Fig. 7b: AdaHessian's squared curvature under the clip (AH+clip). The paper gives no gamma;
# Sophia-H's. 30M model; compare with train_gpt2_30m_sophiag.py.
n_layer = 6
n_head = 6
n_embd = 384
batch_size = 30
optimizer = "ah_clip"
learning_rate = 1e-3
