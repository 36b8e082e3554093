"""The tables, figures and claims around arXiv 2604.15039 that the throughput model can speak to."""
