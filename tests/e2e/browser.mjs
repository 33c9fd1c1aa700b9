// Opens a page in a headless Chromium, wide, on a telephone and dark; prints what it complains about as JSON.
// usage: node browser.mjs PAGE.html CHROMIUM MODULES [FOLDER for pictures]
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [page_file, chromium, modules, pictures] = process.argv.slice(2);
const require = createRequire(pathToFileURL(`${modules}/`));
const puppeteer = (await import(pathToFileURL(require.resolve("puppeteer-core")))).default;
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");

const browser = await puppeteer.launch({
  executablePath: chromium, headless: true, args: ["--no-sandbox", "--disable-gpu", "--hide-scrollbars"], protocolTimeout: 300000,
});
const views = {
  desktop: { width: 1280, height: 1500, scheme: "light" },
  dark: { width: 1280, height: 1500, scheme: "dark" },
  phone: { width: 390, height: 844, scheme: "light" },
};
const told = {};
for (const [name, view] of Object.entries(views)) {
  const page = await browser.newPage();
  const said = { errors: [], requests: [], axe: [], sections: [], overflow: 0, focused: 0 };
  page.on("console", (message) => message.type() === "error" && said.errors.push(message.text()));
  page.on("pageerror", (error) => said.errors.push(String(error)));
  page.on("dialog", async (dialog) => { said.errors.push(`dialog: ${dialog.message()}`); await dialog.dismiss(); });
  page.on("request", (request) => said.requests.push(request.url()));
  await page.setViewport({ width: view.width, height: view.height, deviceScaleFactor: 1, isMobile: name === "phone" });
  await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: view.scheme }]);
  await page.goto(pathToFileURL(page_file).href);
  said.requests = said.requests.filter((url) => url !== pathToFileURL(page_file).href);
  said.sections = await page.$$eval("main section > h2", (titles) => titles.map((title) => title.textContent));
  said.overflow = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
  if (pictures) await page.screenshot({ path: `${pictures}/${name}.png` });
  for (let turn = 0; turn < 12; turn++) {
    await page.keyboard.press("Tab");
    said.focused += await page.evaluate(() => document.activeElement !== document.body);
  }
  await page.$$eval("details", (folded) => folded.forEach((one) => (one.open = true)));
  await page.evaluate(axe);
  const found = await page.evaluate(async () => (await window.axe.run(document)).violations);
  said.axe = found.map((one) => ({ rule: one.id, impact: one.impact, nodes: one.nodes.slice(0, 3).map((node) => node.html.slice(0, 200)) }));
  told[name] = said;
  await page.close();
}
await browser.close();
console.log(JSON.stringify(told));
