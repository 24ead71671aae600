"""Stores out to and in from the formats that others use: Parquet, Hugging Face ``datasets``, DistillKit, plain top-k.

See ``distill_jobs/store/EXCHANGE.md`` for what each file holds.
"""
