/*
 * Imports an output of jobs/score.py into the images of the open project, by the names of the slides.
 *
 * Set OUTPUT to the output folder on this machine (a bucket is copied there first), open the project, and run
 * the script once, without "Run for project".
 *
 * Each image gets the tiles of its slide as detections and, where there is one, the tissue as an annotation.
 * Objects of an earlier import, which have the same ids, are replaced; all others remain. QuPath 0.4 or later.
 */
import qupath.lib.io.PathIO

def OUTPUT = '/path/to/scores'

// A slide whose id is no plain path has eight digits of a hash behind its name.
def folders = [:].withDefault { [] as Set }
new File(OUTPUT, 'slides').eachFileRecurse { file ->
    if (file.name in ['tiles.geojson.gz', 'tiles.geojson'])
        folders[file.parentFile.name.replaceFirst(/-[0-9a-f]{8}$/, '')] << file.parentFile
}

for (entry in getProject().getImageList()) {
    def name = entry.getImageName()
    def found = folders[name]
    if (found.size() != 1) {
        println "${name}: ${found ? 'several slides have this name: ' + found.join(', ') : 'no such slide'}"
        continue
    }
    def there = { new File(found.first(), it).exists() }
    def files = [['tiles.geojson.gz', 'tiles.geojson'].find(there), ['tissue.geojson'].find(there)]
    def objects = files.findAll().collectMany { PathIO.readObjects(new File(found.first(), it)) }
    def ids = objects.collect { it.getID() } as Set
    def imageData = entry.readImageData()
    def hierarchy = imageData.getHierarchy()
    hierarchy.removeObjects(hierarchy.getAllObjects(false).findAll { it.getID() in ids }, true)
    hierarchy.addObjects(objects)
    entry.saveImageData(imageData)
    imageData.getServer().close()
    println "${name}: ${objects.size()} objects"
}
