"""How to go on after a failure: what its message tells of the cause, else what holds for the stage."""

import re

AGAIN = "start a run with the same parameters, or press Retry on the run's page"
CAUSES = {  # by what the message holds; the first that fits
    r"disk is full|make room": f"Free space where the message says, and {AGAIN}: what is whole is kept.",
    r"no permission for": f"Give the user of this run the right to what is named, and {AGAIN}.",
    r"out of memory|memory r[au]ns? out|signal 9\b": (
        f"Lower what the message names, or give the machine more memory, and {AGAIN}. A training goes on from its last "
        "state where the parameters are the same."
    ),
    r"asked to stop": f"The machine or somebody has stopped it; its state is kept: {AGAIN}, and it goes on.",
    r"MLflow": (
        "What was made so far is kept. See to MLflow (its server, its database, the space of its artifact store) and "
        f"{AGAIN}: no version comes twice."
    ),
    r"not finite": (
        "Lower `train.lr` or raise `train.warmup_steps` and start a run with that: the training begins anew. The file "
        "that the message names has the state and the norms of the gradients."
    ),
    r"expectations on .* are broken": (
        "Mend the rows that are named, or allow that many under `validate.tolerated` where the rule lets you. Every "
        "rule with the rows that break it: `python -m pipelines ui docs` serves the Data Docs."
    ),
    r"^(\w+\.)*\w+(Error|Exception)\b": (
        "The code has a mistake, and the same run fails again. The lines below say where: mend it, commit, and start a "
        "run of that commit."
    ),
    r"\bparams\.yaml\b|^(download|validate|model|train|evaluate|register)\.\w+": (
        "Change the parameter that is named, and start a run with that."
    ),
}
STAGES = {
    "download": (
        "The source did not give what `download.sha256` or its own sizes promise, or did not answer. See to it and "
        f"{AGAIN}: what came whole is kept."
    ),
    "validate": f"Mend the data as the message says, and {AGAIN}.",
    "train": (
        f"Its state is kept: {AGAIN}, and it goes on from the last one saved. With other parameters or other code it "
        "begins at step 1."
    ),
    "evaluate": f"The weights are kept: {AGAIN}, and only this stage and the next run.",
    "register": f"The training and its evaluation are kept. Mend the cause and {AGAIN}: no version comes twice.",
}


def advise(stage: str, message: str) -> str:
    for pattern, advice in CAUSES.items():
        if re.search(pattern, message):
            return advice
    return STAGES.get(stage, f"Mend the cause and {AGAIN}.")
