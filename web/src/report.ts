/** The trees of report.html: each canvas from the data in the page, with nothing asked of anybody. */
import { whenColorsChange } from "./canvas";
import { treePanel } from "./panel";
import { Tree, type TreeJson } from "./tree";

const data = JSON.parse(document.getElementById("cotree-data")!.textContent!) as TreeJson[];
document.body.dataset.maths = "mathml";
for (const place of document.querySelectorAll<HTMLElement>("[data-tree]")) {
  const tree = new Tree(data[Number(place.dataset.tree)]);
  const { element, canvas } = treePanel(tree, tree.best(), () => null);
  place.replaceChildren(element);
  whenColorsChange(() => canvas.restyle());
}
