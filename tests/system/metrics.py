"""What a running service counts."""

from __future__ import annotations

import urllib.request

from prometheus_client.parser import text_string_to_metric_families

from deploy.local.processes import LOOPBACK


def sample(port: int, name: str, **labels: str) -> float:
    """The value of one metric at the endpoint of this port, 0 when it has not counted these labels yet."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{LOOPBACK}:{port}/metrics") as answer:
        text = answer.read().decode()
    for family in text_string_to_metric_families(text):
        for found in family.samples:
            if found.name == name and found.labels == labels:
                return float(found.value)
    return 0.0
