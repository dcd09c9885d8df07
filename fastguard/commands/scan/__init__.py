"""`fastguard scan`: where the text logs of other trainers hold NaN or Inf.

`lines` streams any log as clean lines, and `foreign` names what is no text; each dialect
(`ultralytics`, `lightning`, `huggingface`, `table` for CSV, and `plain` for all others) says of a
line where in the run it was written and what it measured; `values` tells a NaN from a word that has
"nan" in it, and `sentences` knows how training says that it met one; `scanner` joins lines to
stretches.
"""
