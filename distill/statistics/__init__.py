"""Intervals, tests and power for accuracies, where the *question* is the unit and never the sample.

Several samples of one question share its difficulty, so everything here starts from one number per question (the mean
over its samples) and, where a method was trained several times, from a matrix (training seeds S, questions n).

One rule for each of two jobs:

* one arm's accuracy: `accuracy_interval`, the Wilson score interval at the effective sample size p(1-p)/SE^2. With
  one sample per question that *is* Wilson's interval; with more it is its cluster-robust form; at 0/n and n/n, where
  a bootstrap or a normal interval collapses to a point, it keeps its width.
* the difference of two arms: `paired_bootstrap`, a symmetric bootstrap over questions, stretched for small samples,
  with training seeds as a random effect. Its p-value is the inversion of its interval, so the two never disagree.

What both promise is checked by simulation (`tests/test_simulation.py`). Accuracies and differences are fractions in
[0, 1] and [-1, 1]; nothing here formats or judges. numpy only.

Sources: Wilson (1927); Dean and Pagano (2015) and Franco et al. (2019) for Wilson under clustering; Efron (1979), Hall
(1988) for the symmetric and Hesterberg (2015) for the stretched bootstrap interval; Satterthwaite (1946); Chen et al.
(2021) for pass@k; Holm (1979); Student (1908); Wilcoxon (1945); Miller (2024, arXiv 2411.00640) for questions as the
unit and for the power formula.
"""

from __future__ import annotations

from distill.statistics.accuracy import accuracy_interval, mean_and_stderr, pass_at_k, wilson_interval
from distill.statistics.paired import Difference, paired_bootstrap, resampling_counts
from distill.statistics.quantiles import NORMAL, student_t_quantile, student_t_tail
from distill.statistics.significance import holm, minimum_detectable_effect, paired_t, wilcoxon_signed_rank
from distill.statistics.variance import Components, components, seed_sd

__all__ = [
    "NORMAL",
    "Components",
    "Difference",
    "accuracy_interval",
    "components",
    "holm",
    "mean_and_stderr",
    "minimum_detectable_effect",
    "paired_bootstrap",
    "paired_t",
    "pass_at_k",
    "resampling_counts",
    "seed_sd",
    "student_t_quantile",
    "student_t_tail",
    "wilcoxon_signed_rank",
    "wilson_interval",
]
