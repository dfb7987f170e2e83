"""What reducers are made of: matching, greedy choice, clustering, spectra, saliency and budgets."""
