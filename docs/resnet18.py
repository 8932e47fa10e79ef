"""torchvision's ResNet-18 on a folder of pictures, from nothing to the report: python docs/resnet18.py PICTURES EPOCHS

PICTURES has `train` and `test`, each with a sub-folder of pictures for each class (docs/pictures.py makes one).
"""

import sys

import torch
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18

import correctnet

pictures, epochs = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
plain = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))])
varied = transforms.Compose([transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), plain])
training, held_out = ImageFolder(f"{pictures}/train", varied), ImageFolder(f"{pictures}/train", plain)
order = torch.randperm(len(training)).tolist()
cut = len(order) // 10
train = DataLoader(Subset(training, order[cut:]), batch_size=128, shuffle=True)
validation = DataLoader(Subset(held_out, order[:cut]), batch_size=500)
test = DataLoader(ImageFolder(f"{pictures}/test", plain), batch_size=500)

network = resnet18(num_classes=len(training.classes))
optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=epochs * len(train))
for _ in range(epochs):
    for images, labels in train:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
        schedule.step()

budgets = {"suppress": {"epochs": epochs}, "search": {"evaluations": 8}, "compensate": {"epochs": epochs}}
found = correctnet.correct(network, train, validation, test, limit=0.03, chips=50, work="resnet18", **budgets)
print(found)
found.report("resnet18.html")
