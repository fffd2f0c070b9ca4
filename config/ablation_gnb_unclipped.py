# torchrun --nproc_per_node=8 train.py config/ablation_gnb_unclipped.py
# Fig. 7c: no clip (GNB): m / max(h, eps) with an estimate every 2 steps; the paper saw it diverge
# with one every 5. eps leaves most coordinates to h (curvature_fraction in metrics.jsonl). The
# paper gives no rate: this one suits the small preset of experiments.figures, which finds others.
# 30M model; compare with train_gpt2_30m_sophiag.py.
n_layer = 6
n_head = 6
n_embd = 384
batch_size = 30
optimizer = "gnb_unclipped"
learning_rate = 1e-4
