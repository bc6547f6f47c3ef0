"""The search for the best hyper-parameters of every optimizer of a study, with equal effort.

`config` holds the keys of a recipe's `search` section; `descent` decides which *settings* to try
next, from losses alone; `variant_search` turns settings into runs; `report` shows what was
searched. A *setting* is one value for each searched key. The path: a section and outcomes -> the
runs that are wanted -> the best setting of each variant, and whether it is *tuned*: whether every
neighbor of it was tried.
"""
