"""What a server's /metrics says, by name and labels."""

import urllib.request

from prometheus_client.parser import text_string_to_metric_families


def scrape(server):
    """Values by (name, sorted labels)."""
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=10) as page:
        text = page.read().decode()
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def value_of(samples, name, **labels):
    return samples.get((name, tuple(sorted(labels.items()))), 0.0)
