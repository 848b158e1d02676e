// Bundles web/src into src/cotree/view/static: app.{js,css} for the viewer's page, report.{js,css} for report.html.
// app.js begins with the sha256 of web/, by which a test sees that the bundle is that of the sources.
import { createHash } from "node:crypto";
import { cpSync, mkdirSync, readFileSync, readdirSync, rmSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import * as esbuild from "esbuild";

const web = fileURLToPath(new URL(".", import.meta.url));
const out = join(web, "../src/cotree/view/static");

/** The files that decide the bundle, with their paths from web/, in the order of these. */
function sources(folder = "") {
  const found = readdirSync(join(web, folder), { withFileTypes: true });
  return found
    .filter((entry) => entry.name !== "node_modules")
    .flatMap((entry) => (entry.isDirectory() ? sources(`${folder}${entry.name}/`) : [folder + entry.name]))
    .sort((a, b) => (a < b ? -1 : 1));
}

const hash = createHash("sha256");
for (const file of sources()) hash.update(`${file}\0`).update(readFileSync(join(web, file))).update("\0");

const katex = readFileSync(join(web, "node_modules/katex/LICENSE"), "utf8").replace(/\s+/g, " ").trim();

// Every browser that has WOFF2 needs neither of KaTeX's other formats.
const onlyWoff2 = {
  name: "only-woff2",
  setup(build) {
    build.onLoad({ filter: /katex\.min\.css$/ }, ({ path }) => ({
      contents: readFileSync(path, "utf8").replace(/,url\([^)]*\.(woff|ttf)\) format\("\w+"\)/g, ""),
      loader: "css",
    }));
  },
};

rmSync(out, { recursive: true, force: true });
mkdirSync(out, { recursive: true });
await esbuild.build({
  entryPoints: ["app.ts", "app.css", "report.ts", "report.css"].map((name) => join(web, "src", name)),
  outdir: out,
  bundle: true,
  minify: true,
  charset: "utf8",
  legalComments: "inline",
  target: ["chrome123", "firefox120", "safari17.5"],
  loader: { ".woff2": "file" },
  assetNames: "[name]",
  banner: { js: `/* web ${hash.digest("hex")} */\n/* KaTeX: ${katex} */`, css: `/* KaTeX: ${katex} */` },
  plugins: [onlyWoff2],
  logLevel: "warning",
});
cpSync(join(web, "src/index.html"), join(out, "index.html"));
