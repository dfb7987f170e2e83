"""Building blocks of reducers: matching, greedy selection, clustering, saliency, budgets."""
