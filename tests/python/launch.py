"""The four shapes of launch/, each started as a user would, driven with the openai client. `launch.py PATH_OF_KVBM`."""

import json
import os
import subprocess
import sys
import tempfile

import openai

SHAPES = ("agg", "agg_router", "disagg", "disagg_router")
PROMPTS = (
    "In the beginning God created the heaven and the earth. And the earth was without form, and void; and darkness "
    "was upon the face of the deep. And the Spirit of God moved upon the face of the waters.",
    "First Citizen: Before we proceed any further, hear me speak. All: Speak, speak.",
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness.",
)


def texts(kvbm: str, shape: str) -> list[str]:
    """What the model says to each prompt, twice: cold, and with what is in the cache by then."""
    with tempfile.TemporaryDirectory(prefix="kvbm") as state:
        environment = os.environ | {
            "KVBM": kvbm,
            "KVBM_STATE_DIR": state,
            # Short prompts, too, are computed apart.
            "KVBM_DISAGG_THRESHOLD_TOKENS": "1",
        }
        script = [f"launch/{shape}.sh", "--json", "--http-port", "0", "--metrics-port", "0", "--cpu-cache-gb", "0.1"]
        with open(f"{state}/log", "w") as log:
            process = subprocess.Popen(script, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        try:
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(open(f"{state}/log").read())
            address = json.loads(line)["http"]
            client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)

            def ask(prompt: str) -> str:
                answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=32, temperature=0)
                chunks = client.completions.create(
                    model="tiny", prompt=prompt, max_tokens=32, temperature=0, stream=True)
                streamed = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
                assert streamed == answer.choices[0].text != ""
                return streamed

            return [ask(prompt) for prompt in PROMPTS * 2]
        finally:
            process.terminate()
            assert process.wait(30) == 0


def main() -> None:
    kvbm = os.path.abspath(sys.argv[1])
    found = {shape: texts(kvbm, shape) for shape in SHAPES}
    for shape, said in found.items():
        assert said == found["agg"], f"{shape} says {said}, agg says {found['agg']}"
    print(f"{len(SHAPES)} shapes say the same")


if __name__ == "__main__":
    main()
