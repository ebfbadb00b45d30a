"""Digits of which some cannot be read."""

import io

import datasets

import timm_lt.data

# What is wrong with which image of a split.
DAMAGE = {
    "train": {3: "cut", 130: "empty", 388: "text"},
    "val": {7: "cut"},
    # Of two processes, the second evaluates both.
    "test": {130: "empty", 250: "text"},
}


def encoded(image, form="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


@timm_lt.data.register_dataset("damaged_digits")
def damaged_digits(split, *, damaged="train,val,test"):
    """The images of digits_lt as files; those that are cut off are JPEG."""
    digits = timm_lt.data.create_dataset("digits_lt", split=split)
    files = [encoded(image) for image in digits["image"]]
    if split in damaged:
        for row, how in DAMAGE[split].items():
            cut = encoded(digits[row]["image"], "JPEG")[:-60]
            files[row] = {"cut": cut, "empty": b"", "text": b"no image"}[how]
    images = [{"bytes": file, "path": f"{split}_{row}.png"} for row, file in enumerate(files)]
    return datasets.Dataset.from_dict(
        {"image": images, "label": digits["label"]}, features=digits.features
    )


@timm_lt.data.register_dataset("failing_digits")
def failing_digits(split, *, row=-1):
    """The images of digits_lt, of which one makes the code that reads it fail."""
    digits = timm_lt.data.create_dataset("digits_lt", split=split)
    files = [{"bytes": encoded(image), "path": None} for image in digits["image"]]
    columns = {"image": files, "label": digits["label"], "row": list(range(len(digits)))}

    def read(batch):
        if split == "train" and row in batch["row"]:
            raise LookupError("a mistake in somebody's code")
        return batch

    features = datasets.Features({**digits.features, "row": datasets.Value("int64")})
    return datasets.Dataset.from_dict(columns, features=features).with_transform(read)
