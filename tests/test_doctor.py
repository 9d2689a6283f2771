import json

from wavelatent.common import metric_weights
from wavelatent.pipelines.doctor import describe, doctor


def test_doctor_says_what_is_missing_and_how_to_get_it(monkeypatch, tmp_path):
    for variable in ("WAVELATENT_CACHE", "TORCH_HOME"):
        monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.delenv("WAVELATENT_WEIGHTS", raising=False)
    report = doctor()
    json.dumps(report)
    assert not report["ok"]
    assert set(report["metric_weights"]) == {"inception", "vgg", "alex"}
    for name, entry in report["metric_weights"].items():
        assert not entry["present"]
        assert "doctor --fetch" in entry["how_to_get"]
        assert metric_weights.SOURCES[name].filename in entry["how_to_get"]
        assert "\n" not in entry["how_to_get"]
    assert report["cache"] == str(tmp_path)
    assert list(tmp_path.iterdir()) == [], "looking must not create anything"


def test_fetch_without_a_network_still_reports(monkeypatch, tmp_path):
    for variable in ("WAVELATENT_CACHE", "TORCH_HOME"):
        monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.delenv("WAVELATENT_WEIGHTS", raising=False)
    monkeypatch.setenv("WAVELATENT_OFFLINE", "1")
    report = doctor(fetch=True)
    assert not report["ok"]
    assert "WAVELATENT_OFFLINE" in report["metric_weights"]["inception"]["how_to_get"]
    assert describe(report).count("MISSING: ") == 3


def test_the_text_tells_present_weights_from_missing_ones():
    report = doctor()
    report["metric_weights"]["vgg"] = {"title": "VGG", "present": False, "how_to_get": "ask for it"}
    report["metric_weights"]["alex"] = {"title": "AlexNet", "present": True, "origin": "a file", "sha256": "0"}
    text = describe(report)
    assert "VGG\n    MISSING: ask for it" in text
    assert "AlexNet\n    present: a file" in text
    assert report["versions"]["torch"] in text
