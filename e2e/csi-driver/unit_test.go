package main

import (
	"errors"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestChanged(t *testing.T) {
	for name, c := range map[string]struct{ base, target, want []extent }{
		"same":              {[]extent{{0, 8, 100}}, []extent{{0, 8, 100}}, nil},
		"rewritten":         {[]extent{{0, 8, 100}}, []extent{{0, 8, 200}}, []extent{{0, 8, 200}}},
		"rewritten within":  {[]extent{{0, 12, 100}}, []extent{{0, 4, 100}, {4, 4, 200}, {8, 4, 108}}, []extent{{4, 4, 200}}},
		"split, not moved":  {[]extent{{0, 8, 100}}, []extent{{0, 4, 100}, {4, 4, 104}}, nil},
		"new":               {nil, []extent{{4, 4, 100}}, []extent{{4, 4, 100}}},
		"discarded":         {[]extent{{4, 4, 100}}, nil, []extent{{4, 4, hole}}},
		"place is unknown":  {[]extent{{0, 4, unknownPlace}}, []extent{{0, 4, unknownPlace}}, []extent{{0, 4, unknownPlace}}},
		"grown":             {[]extent{{0, 4, 100}}, []extent{{0, 4, 100}, {12, 4, 300}}, []extent{{12, 4, 300}}},
		"beyond the volume": {nil, []extent{{12, 8, 100}}, []extent{{12, 4, 100}}},
	} {
		if got := changed(c.base, c.target, 16); !slices.Equal(got, c.want) {
			t.Errorf("%s: got %v, want %v", name, got, c.want)
		}
	}
}

func TestReplies(t *testing.T) {
	const k = 4096
	ranges := []extent{{0, k, 1}, {k, k, 9}, {4 * k, 2 * k, 3}, {8 * k, k, 4}}
	var got [][]int64
	collect := func(b []*csi.BlockMetadata) error {
		var r []int64
		for _, x := range b {
			r = append(r, x.ByteOffset/k, x.SizeBytes/k)
		}
		got = append(got, r)
		return nil
	}
	for name, c := range map[string]struct {
		start int64
		limit int
		want  [][]int64
	}{
		"all":            {0, 0, [][]int64{{0, 2, 4, 2, 8, 1}}},
		"in batches":     {0, 2, [][]int64{{0, 2, 4, 2}, {8, 1}}},
		"within a range": {5*k + 7, 0, [][]int64{{5, 1, 8, 1}}},
		"nothing left":   {9 * k, 0, [][]int64{nil}},
	} {
		got = nil
		if err := replies(ranges, 16*k, c.start, c.limit, collect); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if !slices.EqualFunc(got, c.want, slices.Equal) {
			t.Errorf("%s: got %v, want %v", name, got, c.want)
		}
	}
	for _, start := range []int64{-1, 16 * k} {
		if err := replies(ranges, 16*k, start, 0, collect); status.Code(err) != codes.OutOfRange {
			t.Errorf("start %d: got %v", start, err)
		}
	}
}

func TestParseCut(t *testing.T) {
	got, err := parseCut(map[string]string{"mode": "frozen", "delay": "2s", "readyAfter": "1m", "failures": "3",
		"changedBlocks": "incomplete", "csi.storage.k8s.io/volumesnapshot/name": "x"})
	want := cutParameters{modeFrozen, 2 * time.Second, time.Minute, 3, true}
	if err != nil || got != want {
		t.Errorf("got %+v %v, want %+v", got, err, want)
	}
	if got, err := parseCut(nil); err != nil || got != (cutParameters{mode: modeCrash}) {
		t.Errorf("default: got %+v %v", got, err)
	}
	for k, v := range map[string]string{"mode": "Torn", "delay": "2", "readyAfter": "-1s", "failures": "-1", "changedBlocks": "no", "modus": "torn"} {
		if _, err := parseCut(map[string]string{k: v}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s=%s: got %v", k, v, err)
		}
	}
	if err := onlyKnown(map[string]string{"mode": "torn"}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("a StorageClass with a mode: got %v", err)
	}
}

func TestRecords(t *testing.T) {
	r := records{t.TempDir()}
	if _, err := load[volume](r, "a"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("absent: %v", err)
	}
	for _, id := range []string{"", "../volume-a", "a/b"} {
		if _, err := load[volume](r, id); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("id %q: %v", id, err)
		}
	}
	for _, id := range []string{"b", "a"} {
		if err := save(r, id, volume{ID: id, Size: 7}); err != nil {
			t.Fatal(err)
		}
	}
	if err := save(r, "a", snapshot{ID: "a"}); err != nil { // another kind
		t.Fatal(err)
	}
	all, err := list[volume](r)
	if err != nil || len(all) != 2 || all[0].ID != "a" || all[1].Size != 7 {
		t.Errorf("list: %v %v", all, err)
	}
	for range 2 { // the second finds nothing
		if err := remove[volume](r, "a"); err != nil {
			t.Error(err)
		}
	}
	if _, err := load[snapshot](r, "a"); err != nil {
		t.Errorf("another kind of the same id: %v", err)
	}
	if err := os.WriteFile(r.path("volume", "b"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := list[volume](r); err == nil {
		t.Error("a broken record was passed over")
	}
}

func TestRecordID(t *testing.T) {
	if got := recordID("pvc-1.a_B"); got != "pvc-1.a_B" {
		t.Errorf("got %q", got)
	}
	if a, b := recordID("a/b"), recordID("a_b"); a == b || unsafeInID.MatchString(a) {
		t.Errorf("%q and %q", a, b)
	}
	long := make([]byte, 300)
	for i := range long {
		long[i] = 'x'
	}
	if got := recordID(string(long)); len(got) > 100 {
		t.Errorf("%d bytes", len(got))
	}
}

func TestPage(t *testing.T) {
	for _, c := range []struct {
		token    string
		limit    int
		from, to int
		next     string
	}{{"", 0, 0, 5, ""}, {"", 2, 0, 2, "2"}, {"2", 2, 2, 4, "4"}, {"4", 2, 4, 5, ""}, {"", 5, 0, 5, ""}} {
		from, to, next, err := page(5, c.token, c.limit)
		if from != c.from || to != c.to || next != c.next || err != nil {
			t.Errorf("%+v: got %d %d %q %v", c, from, to, next, err)
		}
	}
	for _, token := range []string{"x", "-1", "6"} {
		if _, _, _, err := page(5, token, 0); status.Code(err) != codes.Aborted {
			t.Errorf("token %q: %v", token, err)
		}
	}
}

func withMode(m csi.VolumeCapability_AccessMode_Mode, c *csi.VolumeCapability) *csi.VolumeCapability {
	c.AccessMode.Mode = m
	return c
}

func TestUsable(t *testing.T) {
	const (
		one  = csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER
		many = csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER
		read = csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY
	)
	device := &csi.VolumeCapability{AccessMode: &csi.VolumeCapability_AccessMode{Mode: one},
		AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}}}
	tree := func(m csi.VolumeCapability_AccessMode_Mode) *csi.VolumeCapability {
		return withMode(m, mountCapability("xfs"))
	}
	for name, c := range map[string]struct {
		m    medium
		caps []*csi.VolumeCapability
		want volumeKind
		code codes.Code
	}{
		"image":                {&images{}, []*csi.VolumeCapability{tree(one)}, volumeKind{fsType: "xfs"}, codes.OK},
		"raw image":            {&images{}, []*csi.VolumeCapability{device}, volumeKind{block: true, fsType: "ext4"}, codes.OK},
		"shared image":         {&images{}, []*csi.VolumeCapability{tree(many)}, volumeKind{}, codes.InvalidArgument},
		"image, nothing":       {&images{}, nil, volumeKind{}, codes.InvalidArgument},
		"image, no type":       {&images{}, []*csi.VolumeCapability{{}}, volumeKind{}, codes.InvalidArgument},
		"shared tree":          {&trees{}, []*csi.VolumeCapability{tree(many), tree(read)}, volumeKind{}, codes.OK},
		"tree that is read":    {&trees{}, []*csi.VolumeCapability{tree(read)}, volumeKind{readOnly: true}, codes.OK},
		"tree as block device": {&trees{}, []*csi.VolumeCapability{device}, volumeKind{}, codes.InvalidArgument},
		"tree, nothing":        {&trees{}, nil, volumeKind{}, codes.InvalidArgument},
	} {
		got, err := c.m.usable(c.caps)
		if status.Code(err) != c.code || (err == nil && got != c.want) {
			t.Errorf("%s: got %+v %v", name, got, err)
		}
	}
}

func TestSizes(t *testing.T) {
	const mib = 1 << 20
	for _, c := range []struct {
		required, limit int64
		kind            volumeKind
		want            int64
		code            codes.Code
	}{
		{0, 0, volumeKind{fsType: "ext4"}, 16 * mib, codes.OK},
		{20*mib + 1, 0, volumeKind{fsType: "ext4"}, 20*mib + 4096, codes.OK},
		{0, 0, volumeKind{fsType: "xfs"}, 300 * mib, codes.OK},
		{0, 0, volumeKind{block: true, fsType: "ext4"}, mib, codes.OK},
		{0, 100 * mib, volumeKind{fsType: "xfs"}, 0, codes.OutOfRange},
		{2000 * mib, 0, volumeKind{fsType: "ext4"}, 0, codes.OutOfRange},
		{0, 0, volumeKind{fsType: "ntfs"}, 0, codes.InvalidArgument},
	} {
		got := int64(0)
		least, err := (&images{}).smallest(c.kind)
		if err == nil {
			got, err = sizeFor(&csi.CapacityRange{RequiredBytes: c.required, LimitBytes: c.limit}, least, 1000*mib)
		}
		if got != c.want || status.Code(err) != c.code {
			t.Errorf("%+v: got %d %v", c, got, err)
		}
	}
}

func TestChooseNode(t *testing.T) {
	d := &driver{options: options{driverName: "d", nodeID: "own", topology: true}}
	other := &csi.Topology{Segments: map[string]string{"zone": "z"}}
	for want, r := range map[string]*csi.TopologyRequirement{
		"own": nil,
		"p":   {Preferred: []*csi.Topology{other, d.topologyOf("p")}, Requisite: []*csi.Topology{d.topologyOf("q")}},
		"q":   {Requisite: []*csi.Topology{d.topologyOf("q")}},
	} {
		if got, err := d.chooseNode(r); got != want || err != nil {
			t.Errorf("got %q %v, want %q", got, err, want)
		}
	}
	if _, err := d.chooseNode(&csi.TopologyRequirement{Requisite: []*csi.Topology{other}}); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("foreign requirement: %v", err)
	}
}

func TestMountinfo(t *testing.T) {
	info := []byte("36 35 98:0 / /mnt/a\\040b rw - ext4 /dev/loop0 rw\n37 35 98:0 /x /mnt/c rw - ext4 /dev/loop0 rw\n")
	for path, want := range map[string]bool{"/mnt/a b": true, "/mnt/c/": true, "/mnt": false, "/x": false, "/mnt/a": false} {
		if got := mountinfoHas(info, path); got != want {
			t.Errorf("%s: got %v", path, got)
		}
	}
}

func TestExt4Size(t *testing.T) {
	super := make([]byte, 1024)
	super[0x4], super[0x5] = 0, 1 // 256 blocks
	super[0x18] = 2               // of 4 KiB
	super[0x150] = 1              // and 2^32 more
	if size, block := ext4Size(super); size != (256+1<<32)*4096 || block != 4096 {
		t.Errorf("got %d %d", size, block)
	}
}

func TestParseOptions(t *testing.T) {
	o, err := parseOptions([]string{"--endpoint", "unix:///a/b", "--node-id=n", "--pool=/p"})
	if err != nil || o.endpoint != "/a/b" || o.driverName != "csi.test.lifeboat.dev" {
		t.Errorf("got %+v %v", o, err)
	}
	for _, bad := range [][]string{{"--pool=/p"}, {"--node-id=n"}, {"--node-id=n", "--pool=/p", "x"}, {"--node-id=n", "--pool=/p", "--endpoint=tcp://x"}} {
		if _, err := parseOptions(bad); err == nil {
			t.Errorf("%v was accepted", bad)
		}
	}
}

func mountCapability(fsType string) *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: fsType}},
	}
}
