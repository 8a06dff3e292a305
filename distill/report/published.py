"""Published comparisons of distilled and RL-trained students, to read one's own by: other models, data and budgets.

None of these reports an interval, and none matches compute: DeepSeek-R1 compares 800 000 curated traces with more than
10 000 steps of RL, Qwen3 states hours of GPU time alone.
"""

from __future__ import annotations

from typing import Any

# Rows are (name, values); None where the source has no number. Scores are percent, pass@1 of several samples.
PUBLISHED: tuple[dict[str, Any], ...] = (
    {
        "title": "One base model, RL or distillation (Qwen2.5-32B)",
        "source": "DeepSeek-R1, arXiv 2501.12948v1, Table 6",
        "columns": ("AIME 2024", "cons@64", "MATH-500", "GPQA Diamond", "LiveCodeBench"),
        "rows": (
            ("QwQ-32B-Preview", (50.0, 60.0, 90.6, 54.5, 41.9)),
            ("DeepSeek-R1-Zero-Qwen-32B: RL", (47.0, 60.0, 91.6, 55.0, 40.2)),
            ("DeepSeek-R1-Distill-Qwen-32B: distilled", (72.6, 83.3, 94.3, 62.1, 57.2)),
        ),
    },
    {
        "title": "One teacher, students of many sizes",
        "source": "DeepSeek-R1, arXiv 2501.12948v1, Table 5",
        "columns": ("AIME 2024", "cons@64", "MATH-500", "GPQA Diamond", "LiveCodeBench"),
        "rows": (
            ("Distill-Qwen-1.5B", (28.9, 52.7, 83.9, 33.8, 16.9)),
            ("Distill-Qwen-7B", (55.5, 83.3, 92.8, 49.1, 37.6)),
            ("Distill-Qwen-14B", (69.7, 80.0, 93.9, 59.1, 53.1)),
            ("Distill-Qwen-32B", (72.6, 83.3, 94.3, 62.1, 57.2)),
            ("Distill-Llama-8B", (50.4, 80.0, 89.1, 49.0, 39.6)),
            ("Distill-Llama-70B", (70.0, 86.7, 94.5, 65.2, 57.5)),
            ("OpenAI o1-mini, for comparison", (63.6, 80.0, 90.0, 60.0, 53.8)),
        ),
    },
    {
        "title": "One distilled start, then RL or on-policy distillation (Qwen3-8B)",
        "source": "Qwen3 Technical Report, arXiv 2505.09388, Table 21",
        "columns": ("AIME 2024", "AIME 2025", "MATH500", "GPQA Diamond", "LiveCodeBench v5", "GPU hours"),
        "rows": (
            ("Off-policy distillation", (55.0, 42.8, 92.4, 55.6, 42.0, None)),
            ("+ reinforcement learning", (67.6, 55.5, 94.8, 61.3, 52.9, 17920)),
            ("+ on-policy distillation", (74.4, 65.5, 97.0, 63.3, 60.3, 1800)),
        ),
    },
)
