"""A CNN learns images from folders on all machines, is deployed, and is asked.

Needs a running cluster (`potluck up` on each machine) and the folders `train` and `test`, one sub-folder a class:

    python examples/image_classification.py train test

The trained model (155 MB) is saved in a temporary folder, or as the file that a third argument names.
"""

import sys
import tempfile
from pathlib import Path

import keras
import numpy as np

import potluck

train, test = (Path(folder) for folder in sys.argv[1:3] or ("train", "test"))
output = Path(sys.argv[3]) if sys.argv[3:] else Path(tempfile.mkdtemp(prefix="potluck-")) / "model.keras"
classes = sorted(folder.name for folder in train.iterdir() if folder.is_dir())

model = keras.Sequential([keras.Input((128, 128, 3))])
for filters in (32, 64, 128):
    model.add(keras.layers.Conv2D(filters, 3, activation="relu"))
    model.add(keras.layers.MaxPooling2D(2))
model.add(keras.layers.Flatten())
model.add(keras.layers.Dense(512, activation="relu"))
model.add(keras.layers.Dense(len(classes), activation="softmax"))
model.compile(optimizer="adam", loss="categorical_crossentropy", metrics=["accuracy"])

with potluck.Client() as client:
    job = client.train(model, train, validation=test, epochs=10, batch_size=32, name="images")
    for progress in job.progress():
        print(f"epoch {progress.epoch}/{progress.epochs}  {progress.items_per_second:.0f} images/s  {progress.metrics}")
    print(f"the trained model is in {job.model(output)}")
    print(client.evaluate("images", test).wait().evaluation.metrics)
    client.deploy("images", replicas=2).wait()

    picture = next(file for file in sorted((test / classes[0]).iterdir()) if file.is_file())
    pixels = keras.utils.img_to_array(keras.utils.load_img(picture, target_size=(128, 128), interpolation="bilinear"))
    scores = client.infer("images", pixels[np.newaxis] / 255.0)
    print(f"{picture}: {classes[int(np.argmax(scores))]} ({np.max(scores):.0%})")
