"""What many runs gave, side by side: from run folders (`headlines`, `groups`, `tables`), or from the raw rows of a study
(`rawrows`, `paired`, `outcome`).
"""
