"""Reads the trackers of a run directory with the programs' own readers, and prints what they see as one JSON object.

Needs tensorboard, mlflow-skinny, and a wandb that has its Python reader (0.22.3 does, 0.31 does not).
"""

import glob
import json
import os
import sys

os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"


def tensorboard(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(run + "/tensorboard", size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    tensors = {tag: [[it.step, it.tensor_proto.string_val[0].decode()] for it in events.Tensors(tag)]
               for tag in tags["tensors"] if not tag.startswith("_hparams_")}
    from tensorboard.plugins.hparams import metadata
    from google.protobuf.json_format import MessageToDict
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    start = metadata.parse_session_start_info_plugin_data(content)
    hparams = {name: MessageToDict(value) for name, value in start.hparams.items()}
    scalars = {tag: [[it.step, it.value] for it in events.Scalars(tag)] for tag in tags["scalars"]}
    return {"metrics": scalars, "texts": tensors, "config": hparams}


def wandb(run):
    import wandb as package
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    package._assert_is_internal_process = True
    [path] = glob.glob(run + "/wandb/offline-run-*/run-*.wandb")
    store = DataStore()
    store.open_for_scan(path)
    seen = {"metrics": {}, "texts": {}, "config": {}, "records": [], "steps": []}
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        seen["records"].append(kind)
        if record.num != len(seen["records"]):
            raise SystemExit(f"record {record.num} is number {len(seen['records'])}")
        if kind == "run":
            seen["config"] = {it.key: json.loads(it.value_json) for it in record.run.config.update}
            seen["project"] = record.run.project
            seen["name"] = record.run.display_name
        elif kind == "history":
            items = {it.key: json.loads(it.value_json) for it in record.history.item}
            if record.history.step.num != items["_step"]:
                raise SystemExit(f"{record}")
            seen["steps"].append(items["_step"])
            for name, value in items.items():
                if name == "samples":
                    page = os.path.dirname(path) + "/files/" + value["path"]
                    seen["texts"][str(items["_step"])] = open(page, encoding="utf-8").read()
                elif not name.startswith("_"):
                    seen["metrics"].setdefault(name, []).append([items["_step"], value])
        elif kind == "summary":
            seen["summary"] = {it.key: json.loads(it.value_json) for it in record.summary.update}
        elif kind == "exit":
            seen["exit_code"] = record.exit.exit_code
    return seen


def mlflow(run):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=run + "/mlruns")
    [experiment] = client.search_experiments()
    [found] = client.search_runs([experiment.experiment_id])
    run_id = found.info.run_id
    metrics = {name: [[it.step, it.value] for it in client.get_metric_history(run_id, name)]
               for name in found.data.metrics}
    artifacts = [it.path for it in client.list_artifacts(run_id, "samples")]
    return {"metrics": metrics, "config": found.data.params, "experiment": experiment.name, "status": found.info.status,
            "name": found.info.run_name, "tags": found.data.tags, "artifacts": artifacts}


if __name__ == "__main__":
    print(json.dumps({reader.__name__: reader(sys.argv[1]) for reader in (tensorboard, wandb, mlflow)}))
