"""Data: from text to the batches that each rank trains on.

``text`` reads documents and holds some of them out; ``tokenizer`` turns text into token ids and back, and ``bpe``
learns such a tokenizer from the text itself; ``corpus`` is the text as tokens, in one process, and ``loading`` makes
the same corpus on all ranks together; ``batches`` cuts tokens into samples and deals samples to ranks.
"""
