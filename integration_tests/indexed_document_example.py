# mypy: ignore-errors
# ruff: noqa: PTH118, PTH123, SIM115, T201
"""The example of section 1.5 of the documentation, with what its conversion from a PDF had broken put right.

Indentation, the dot of `pool.imap_unordered` and a loop's lost `i = 0` are restored, the numbers of files and processes
are smaller, and `YourTokenizer` is a CPM-1 tokenizer. Each file is closed, which the example forgets.
"""

import multiprocessing
import os
import random
import sys

import numpy as np
import torch

from model_center import engine as bmt
from model_center.dataset import DistributedMMapIndexedDataset
from model_center.tokenizer import CPM1Tokenizer
from model_center.tools import indexed_dataset

FOLDER = sys.argv[1]


class Encoder:
    def __init__(self):
        self.tokenizer = CPM1Tokenizer(os.path.join(FOLDER, "vocab.txt"))

    def initializer(self):
        pass

    def encode(self, line):
        data = line.strip().replace("<n>", "\n")  # replace back line break symbol
        doc_ids = self.tokenizer.encode(data)

        max_length = 512  # model's maximum input length
        pieces = []
        i = 0
        while i < len(doc_ids):  # split document into chunks with model's maximum length
            piece = doc_ids[i : i + max_length]
            if len(piece) < 32:  # drop too short chunks
                break
            i += max_length
            pieces.append(piece)
        return pieces


class YourDataset(torch.utils.data.Dataset):
    def __init__(self, ctx):
        self.ctx = ctx

    def __len__(self):
        return len(self.ctx)

    def __get_item_data(self, input_ids):  # do extra processing
        length = input_ids.shape[0]

        # randomly mask a span in range [lef, rig)
        lef = random.randint(0, length)
        rig = random.randint(lef, length)

        # pretrain objective: regenerate the masked span and ignore other positions
        targets = np.full((length), -100)  # -100 as ignore_index
        targets[lef:rig] = input_ids[lef:rig]

        # calculate attention_mask, to tell model which positions are visible
        attention_mask = (np.arange(length) < lef) | (np.arange(length) > rig)
        return input_ids, targets, length, attention_mask

    def __getitem__(self, ith):
        input_ids = self.ctx[ith]  # get the i-th data from DistributedMMapIndexedDataset
        return self.__get_item_data(input_ids)  # do extra processing and return


if __name__ == "__main__":
    bmt.init_distributed(seed=0)
    for ith in range(1, 4):
        fin = open(os.path.join(FOLDER, f"data_{ith}.txt"), encoding="utf-8")

        # encoder use the tokenizer to encode data
        encoder = Encoder()

        # 2. Mapping all datas with Encoder, with the help of multiprocessing
        pool = multiprocessing.Pool(processes=2, initializer=encoder.initializer)
        encoded_docs = pool.imap_unordered(encoder.encode, fin, chunksize=10)

        # 3. tool `indexed_dataset` compress the tokenized data into binary format `bin_file`
        bin_file = os.path.join(FOLDER, f"tokenized_{ith}.bin")
        idx_file = os.path.join(FOLDER, f"tokenized_{ith}.idx")

        binary_builder = indexed_dataset.make_builder(bin_file, impl="mmap", dtype=np.uint16)

        # put tokenized data into binary_builder
        for pieces in encoded_docs:
            for doc_ids in pieces:
                binary_builder.add_item(torch.IntTensor(doc_ids))

        # finish compressing tokenized data into `bin_file`, and generate meta-information into `idx_file`
        binary_builder.finalize(idx_file)

        # close multiproceessing mapping
        pool.close()
        fin.close()

    dataset = YourDataset(DistributedMMapIndexedDataset(FOLDER, "tokenized", bmt.rank(), bmt.world_size()))
    for ith in range(len(dataset)):
        input_ids, targets, length, attention_mask = dataset[ith]
        assert input_ids.shape == targets.shape == attention_mask.shape == (length,)
        print(" ".join(map(str, input_ids)))
