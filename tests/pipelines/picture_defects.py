"""Defects of images: of their entries, their pictures and the archive that these are in."""

import io
import struct

from PIL import Image

from tests.damage import join_chunks
from tests.pipelines.defects import Defect, fixed, image, planting, setting, without

NUM_QUERIES = 20
DEFECTS: dict[str, Defect] = {}
defect = planting(DEFECTS)


def encoded(data, kind, mode="RGB", **extra):
    file = io.BytesIO()
    Image.open(io.BytesIO(data)).convert(mode).save(file, kind, **extra)
    return file.getvalue()


for title, change in {
    "an image without id": without("images", 0, "id"),
    "an image id that is a string": setting("images", 0, id="7"),
    "an image id that is a fraction": setting("images", 0, id=1.5),
    "an image id that is true": setting("images", 0, id=True),
    "an image id beyond 2**53": setting("images", 0, id=2**60),
}.items():
    defect(title, "image_valid", ids=fixed("images[0]"))(change)
for title, values in {
    "a height that is a string": {"height": "72"},
    "a width of zero": {"width": 0},
    "a negative height": {"height": -72},
    "a height that is null": {"height": None},
}.items():
    defect(title, "image_valid", ids=image(0))(setting("images", 0, **values))
defect("an image without width", "image_valid", ids=image(0))(without("images", 0, "width"))
defect("an image without a file name", "image_valid", ids=image(0))(without("images", 0, "file_name"))
for title, name in {
    "an empty file name": "",
    "a file name of half a letter": "\ud83d.png",
}.items():
    defect(title, "image_valid", ids=image(0))(setting("images", 0, file_name=name))


@defect("two images with one id", "image_id_unique", ids=image(0, 0), count=2)
def _(d):
    d["images", 1]["id"] = d["images", 0]["id"]


@defect(
    "two images of one file",
    "file_name_unique",
    ids=image(0, 1),
    also={"train_archive member_listed", "train_images picture_size"},
)
def _(d):
    d["images", 1]["file_name"] = d["images", 0]["file_name"]


@defect("a picture that is not there", "picture_found", ids=image(2))
def _(d):
    del d.files["train"][2]


@defect("a picture that is there under two paths", "picture_found", ids=image(2))
def _(d):
    name, data = d.files["train"][2]
    d.files["train"][2:3] = [(f"a/{name}", data), (f"b/{name}", data)]


@defect(
    "a file that is twice in the archive",
    "member_name_unique",
    table="train_archive",
    ids=lambda d: [d["images", 2]["file_name"]] * 2,
    count=2,
)
def _(d):
    d.files["train"].append(d.files["train"][2])


@defect("a compressed file", "member_stored", table="train_archive", ids=lambda d: [d["images", 3]["file_name"]])
def _(d):
    d.compressed.add(("train", d["images", 3]["file_name"]))


@defect("a picture that nobody lists", "member_listed", "warning", "train_archive", ids=fixed("other.jpg"))
def _(d):
    d.files["train"].append(("other.jpg", encoded(d.picture(0), "JPEG", quality=20)))


@defect("another size than annotated", "picture_size", ids=image(0))
def _(d):
    d["images", 0]["height"] += 1


@defect("width and height exchanged", "picture_size", ids=lambda d: [next(turned(d))["id"]])
def _(d):
    entry = next(turned(d))
    entry["width"], entry["height"] = entry["height"], entry["width"]
    for a in d.json["train"]["annotations"]:
        if a["image_id"] == entry["id"]:
            a.update(bbox=[1, 1, 9, 9], area=80)
    keep_one_label_each(d, entry["id"])


def turned(d):
    return (entry for entry in d.json["train"]["images"] if entry["width"] != entry["height"])


def keep_one_label_each(d, image_id):
    """Sets the boxes of an image apart, so that none is a repeated label."""
    mine = [a for a in d.json["train"]["annotations"] if a["image_id"] == image_id]
    for k, a in enumerate(mine):
        a["bbox"] = [1 + k, 1, 9, 9]


@defect("a text in the place of a picture", "picture_opens", ids=image(0))
def _(d):
    d.set_picture(0, b"<html>404 Not Found</html>")


@defect("an empty file in the place of a picture", "picture_opens", ids=image(0))
def _(d):
    d.set_picture(0, b"")


@defect("a GIF", "picture_opens", ids=image(1))
def _(d):
    d.set_picture(1, encoded(d.picture(1), "GIF"))


@defect("a bit that flipped on the disk", "picture_opens", ids=image(1))
def _(d):
    middle = len(d.picture(1)) // 2
    part = d.picture(1)[middle : middle + 20]
    d.damaged[part] = bytes([part[0] ^ 1]) + part[1:]


@defect("a JPEG cut in the middle", "picture_whole", ids=image(1))
def _(d):
    d.set_picture(1, d.picture(1)[: len(d.picture(1)) // 2])


@defect("a JPEG that lacks its last byte", "picture_whole", ids=image(1))
def _(d):
    d.set_picture(1, d.picture(1)[:-1])


@defect("a JPEG cut behind its thumbnail", "picture_whole", ids=image(1))
def _(d):
    thumbnail = d.picture(0)
    exif = b"Exif\0\0" + thumbnail
    with_thumbnail = d.picture(1)[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + d.picture(1)[2:]
    d.set_picture(1, with_thumbnail[: len(with_thumbnail) - 500])


@defect("a PNG cut short", "picture_whole", ids=image(1), also={"train_images picture_format"})
def _(d):
    d.set_picture(1, encoded(d.picture(1), "PNG")[:-30])


@defect("a PNG with a hole", "picture_decodes", ids=image(1), also={"train_images picture_format"})
def _(d):
    data = bytearray(encoded(d.picture(1), "PNG"))
    data[len(data) // 2 : len(data) // 2 + 500] = bytes(500)
    d.set_picture(1, bytes(data))


@defect("a PNG with a wrong checksum", "picture_decodes", ids=image(1), also={"train_images picture_format"})
def _(d):
    data = bytearray(encoded(d.picture(1), "PNG"))
    data[-13] ^= 1
    d.set_picture(1, bytes(data))


@defect("a PNG of 200 megapixels", "picture_opens", ids=image(1))
def _(d):
    header = (b"IHDR", struct.pack(">IIBBBBB", 20_000, 10_000, 1, 0, 0, 0, 0))
    d.set_picture(1, join_chunks([header, (b"IDAT", b""), (b"IEND", b"")]))


@defect("a PNG named .jpg", "picture_format", "warning", ids=image(1))
def _(d):
    d.set_picture(1, encoded(d.picture(1), "PNG"))


@defect("a picture without an ending in its name", "picture_format", "warning", ids=image(1))
def _(d):
    d["images", 1]["file_name"] = "picture"
    d.files["train"][1] = "picture", d.picture(1)


@defect("a picture in print colours", "picture_colour", "warning", ids=image(1))
def _(d):
    d.set_picture(1, encoded(d.picture(1), "JPEG", "CMYK"))


@defect("a picture with transparency", "picture_colour", "warning", ids=image(1), also={"train_images picture_format"})
def _(d):
    d.set_picture(1, encoded(d.picture(1), "PNG", "RGBA"))


@defect("a picture of 16 bits", "picture_colour", "warning", ids=image(1), also={"train_images picture_format"})
def _(d):
    d.set_picture(1, encoded(d.picture(1), "PNG", "I;16"))


@defect("a picture that its camera calls turned", "picture_upright", "warning", ids=image(1))
def _(d):
    exif = Image.Exif()
    exif[0x0112] = 6
    d.set_picture(1, encoded(d.picture(1), "JPEG", exif=exif))


@defect("a picture that is one pixel high", "picture_shape", "warning", ids=image(1))
def _(d):
    file = io.BytesIO()
    Image.open(io.BytesIO(d.picture(1))).resize((20_000, 1)).save(file, "JPEG")
    d.set_picture(1, file.getvalue())
    d["images", 1].update(width=20_000, height=1)
    for k, a in enumerate(a for a in d.json["train"]["annotations"] if a["image_id"] == d["images", 1]["id"]):
        a.update(bbox=[50 * k, 0, 50, 1], area=50)


@defect("one picture twice", "picture_unique", "warning", ids=image(0, 1), count=2)
def _(d):
    d.set_picture(1, d.picture(0))
    for key in ("width", "height"):
        d["images", 1][key] = d["images", 0][key]
    for a in d.json["train"]["annotations"]:
        if a["image_id"] == d["images", 1]["id"]:
            a.update(bbox=[1, 1, 9, 9], area=80)
    keep_one_label_each(d, d["images", 1]["id"])


@defect(
    "a training picture among the validation ones",
    "picture_held_out",
    table="val_images",
    ids=lambda d: [d.json["val"]["images"][0]["id"]],
)
def _(d):
    name = d.json["val"]["images"][0]["file_name"]
    d.files["val"][0] = name, d.picture(0)
    for key in ("width", "height"):
        d.json["val"]["images"][0][key] = d["images", 0][key]
    first = d.json["val"]["images"][0]["id"]
    for k, a in enumerate(a for a in d.json["val"]["annotations"] if a["image_id"] == first):
        a.update(bbox=[1 + k, 1, 9, 9], area=80)


@defect("an image without objects", "image_has_objects", "warning", ids=image(0))
def _(d):
    first = d["images", 0]["id"]
    d.json["train"]["annotations"] = [a for a in d.json["train"]["annotations"] if a["image_id"] != first]


@defect("more objects than queries", "image_fits_queries", "warning", ids=image(0))
def _(d):
    for k in range(NUM_QUERIES + 1):
        d.json["train"]["annotations"].append(d["annotations", 0] | {"id": 9000 + k, "bbox": [k, 1, 9, 9], "area": 80})


@defect("one object labelled twice", "labels_unique", "warning", ids=lambda d: [d["annotations", 0]["image_id"]])
def _(d):
    d.json["train"]["annotations"].append(d["annotations", 0] | {"id": 9000})


@defect("no images", "images_exist", ids=fixed(), count=1)
def _(d):
    d.json["train"]["images"] = []
